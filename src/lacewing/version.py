"""The version, for everything that needs it without loading the package's top."""

__version__ = "0.1.0"
