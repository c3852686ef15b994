"""Supported model families, one module each; every module defines `FAMILY`."""
