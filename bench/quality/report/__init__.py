"""Reports of an ablation: Markdown, and one HTML file that needs nothing else."""

from .write import write_reports

__all__ = ["write_reports"]
