"""The one place where this project's version stands."""

VERSION = "0.2.0"
