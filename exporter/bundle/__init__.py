"""Writing of bundle folders."""
