"""Export of a trained adapter: a folder that other libraries load, with a model card."""
