"""Evaluation: benchmarks as data, one embedding a picture, scores with intervals (eval/README.md)."""
