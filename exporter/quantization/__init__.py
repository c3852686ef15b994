"""Quantization: recipes, rotation, calibration and rounding."""
