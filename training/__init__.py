"""How the small models of demo and tests were trained, what was learnt, and the faces it was learnt from."""
