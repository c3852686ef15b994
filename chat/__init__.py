"""What every chat front end shares: conversations and their store, parameters, presets and endpoints."""
