"""The Python interface of `import qflow`: prepare, calibrate, check, cost; QuantAnalysis; the plugin's names."""

__all__ = [
    "frames",
    "imports",
    "library",
    "load",
    "plugin_check",
    "plugin_names",
    "prepared",
    "qat_mode",
    "quant_analysis",
    "registered",
    "repair",
    "training",
]
