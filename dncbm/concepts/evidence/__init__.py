"""What speaks for a latent and its name: tests of names, images, other seeds.

Imports what its room may import; `naming` reads its test of names.
"""
