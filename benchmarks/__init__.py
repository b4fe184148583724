"""Measurements that print ratios; what they printed, and where, is in docs/."""
