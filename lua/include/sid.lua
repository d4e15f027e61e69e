-- The connection that the call is about: what its key ends with, which begins as that of last_seen does.
-- Reads its includer's conn_key and last_seen_key.
local sid = conn_key:sub(#last_seen_key - #'last_seen' + #'conn:' + 1)
