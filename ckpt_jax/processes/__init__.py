"""How several processes agree: what they share, meetings, and a step that all of them reach."""
