"""The roles as Ray actors: placement, start, calls, deadlines. The only folder that imports Ray, and the one that knows
all roles."""
