"""The formats of artifacts, a folder each; ``formats.py`` has a row for each of them.

Importing this package fills the table ``compress.formats.FORMATS`` and imports no format.
"""

from exporters import formats as formats
