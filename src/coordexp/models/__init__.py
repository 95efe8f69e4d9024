"""Qwen3-VL: loading, vocabulary expansion, adapters, attention, and forward passes that return hidden states."""
