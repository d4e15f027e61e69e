-- About how often TTLs are refreshed: by a heartbeat, or a register that displaces, with a chance of the time since the
-- one before, in parts of this. So it happens about once in 15 minutes, however often they come, always after a longer
-- silence, and without asking a key for its TTL. Keys outlive their connections by a day: that all of that day miss is
-- less likely than e^-92.
local refresh_interval_ms = 900000
