"""packlight's workshop: checkpoint, arithmetic, quality. No artifact format lives here."""

__version__ = "0.1.0"
