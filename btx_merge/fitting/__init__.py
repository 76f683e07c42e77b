"""The verb `fit`: routers and shared weights without training, layer by layer."""
