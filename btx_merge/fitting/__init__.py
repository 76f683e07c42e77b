"""The verb `fit`: routers and shared weights in closed form, layer by layer."""
