-- A heartbeat, or a registration that displaces, refreshes the TTLs with a probability of the time since the previous
-- one, divided by this: about once in 15 minutes however often they come, always after a longer silence, and without
-- asking a key for its TTL. Keys outlive their connections by 27 hours; the chance that all heartbeats of that time
-- miss is less than e^-100.
local refresh_interval_ms = 900000
