"""Signers: by what a device knows that a plan or a bundle is its server's."""
