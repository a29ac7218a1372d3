"""The bottlenecks of public latent action models in plain torch, written from their description.

Each module has the constructor, attributes, state_dict keys, arithmetic and order of random draws of the project it is
named after. The drop-in forms are tested against these and timed beside them.
"""
