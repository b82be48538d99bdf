"""The version of qflow, for the package, its manifests and `qflow.__version__`."""

VERSION = "0.1.0"
