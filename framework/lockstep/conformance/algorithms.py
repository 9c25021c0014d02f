"""What an algorithm does, seen from what crosses the waist."""
