"""What `import qflow` gives: prepare, calibrate, check, cost; QuantAnalysis; the plugin's names."""

__all__ = ["frames", "library", "plugin_names", "quant_analysis"]
