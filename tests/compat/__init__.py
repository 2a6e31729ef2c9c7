"""Tests of `dilated_attention_pytorch.compat`."""
