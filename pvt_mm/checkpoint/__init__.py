"""State dicts and checkpoint files: their formats, how they are read, how a backbone takes them."""

from pvt_mm.checkpoint.convert import convert_checkpoint
from pvt_mm.checkpoint.safe_load import read_checkpoint

__all__ = ['convert_checkpoint', 'read_checkpoint']
