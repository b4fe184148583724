from tests.training.conftest import inputs

__all__ = ["inputs"]
