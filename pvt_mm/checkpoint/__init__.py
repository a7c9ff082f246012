"""State dicts and checkpoint files: formats, safe reading, loading into a backbone."""

from pvt_mm.checkpoint.convert import convert_checkpoint
from pvt_mm.checkpoint.safe_load import read_checkpoint

__all__ = ['convert_checkpoint', 'read_checkpoint']
