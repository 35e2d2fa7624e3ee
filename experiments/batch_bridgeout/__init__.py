"""Batch Bridgeout: pruning filters after training with noise (Khan & Stavness 2020)."""
