"""Workers, the rescuer, and the server that they work for."""
