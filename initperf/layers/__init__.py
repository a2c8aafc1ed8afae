"""The layers that train survivors only, and conversions to and from them."""
