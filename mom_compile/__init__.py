"""Mixture-of-Memories linear attention, compiler first."""
