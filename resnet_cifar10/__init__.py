"""ResNets for small images: from a table of settings to trained networks, a report and classified photos."""
