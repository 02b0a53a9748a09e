"""How small can the token embedding of a GPT become, and at what cost in loss?"""

__version__ = "0.1.0"
