"""`python -m car_control_plane` is `car-cp`."""

import sys

from car_control_plane.cli import main

if __name__ == "__main__":
    sys.exit(main())
