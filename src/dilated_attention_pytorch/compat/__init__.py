"""Faces of other packages: `torchscale` for LongNet, LongViT and Prov-GigaPath, `transformers` for Hugging Face.

Each is imported by name, and needs the other package only where it is handed its objects.
"""
