"""Layouts of groups in plain Python, one run of blocks at a time, and what they let a position see."""

import numpy as np


def systematic(blocks: int, g: int, h: int) -> list[int]:
    """Sizes of the groups of a run: h blocks first, then g each, the last cut."""
    sizes = [min(h, blocks)] if h else []
    while sum(sizes) < blocks:
        sizes.append(min(g, blocks - sum(sizes)))
    return sizes


def starts(sizes: list[int]) -> list[int]:
    """The first block of each block's group."""
    found = []
    for size in sizes:
        found += [len(found)] * size
    return found


def runs(segment_ids: np.ndarray, loss_mask: np.ndarray, block_size: int) -> list[list[int]]:
    """Of one row, the first positions of the blocks of each run: blocks with loss that follow each other."""
    found: list[list[int]] = []
    goes_on = False
    first = 0
    for i, segment in enumerate(segment_ids):
        if i == 0 or segment != segment_ids[i - 1]:
            first, goes_on = i, False
        if segment == 0 or (i - first) % block_size:
            continue
        block = [
            j for j in range(i, min(i + block_size, len(segment_ids))) if segment_ids[j] == segment
        ]
        if not loss_mask[block].any():
            goes_on = False
            continue
        if goes_on:
            found[-1].append(i)
        else:
            found.append([i])
        goes_on = True
    return found


def dense(segment_ids: np.ndarray, block_size: int, group_start: np.ndarray) -> np.ndarray:
    """The mask [2L, 2L] of one row, [noisy | clean], by B.7 to B.9 of arXiv 2606.29215."""
    length = len(segment_ids)
    first = np.zeros(length, int)
    for i in range(1, length):
        first[i] = first[i - 1] if segment_ids[i] == segment_ids[i - 1] else i
    block = (np.arange(length) - first) // block_size
    mask = np.zeros((2 * length, 2 * length), bool)
    for i in range(length):
        for j in range(length):
            if segment_ids[i] == 0 or segment_ids[i] != segment_ids[j] or first[i] != first[j]:
                continue
            same_group = group_start[i] == group_start[j]
            mask[i, j] = same_group and block[j] <= block[i]
            mask[i, length + j] = j < group_start[i]
            mask[length + i, length + j] = block[j] <= block[i]
    return mask
