"""What a tuning run found: a summary for the terminal, and one self-contained HTML file."""

from .facts import Race, Report, as_dict, summarise
from .page import page
from .text import plain, show

__all__ = ["Race", "Report", "as_dict", "page", "plain", "show", "summarise"]
