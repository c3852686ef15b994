"""Quantization: recipes, weight formats, rotation and calibration."""
