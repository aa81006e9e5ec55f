"""The roles as Ray actors: placement, start, calls, deadlines. The only folder that imports Ray, and the one that knows
all roles."""

import os

# Ray reads this when it is imported. Its dashboard has 60 seconds by default, and took as long on two busy cores.
DASHBOARD_LIMIT = "RAY_DASHBOARD_STARTUP_TIMEOUT_S"
os.environ.setdefault(DASHBOARD_LIMIT, "150")
