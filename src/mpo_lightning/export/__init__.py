"""A trained adapter becomes a folder that other libraries load, with a card that tells of it."""
