-- A heartbeat, or a register that displaces, refreshes the TTLs with a probability of the time since the one before,
-- divided by this. So it happens about once in 15 minutes, however often they come, always after a longer silence, and
-- without asking a key for its TTL. Keys outlive their connections by 27 hours: that all of these miss is less likely
-- than e^-100.
local refresh_interval_ms = 900000
