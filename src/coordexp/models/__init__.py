"""Qwen3-VL: loading, the tiny architecture, vocabulary expansion, and forwards that return hidden states."""
