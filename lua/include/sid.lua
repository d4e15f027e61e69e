-- The connection that the call is about: what its key ends with, which begins as that of last_seen does.
local sid = conn_key:sub(#last_seen_key - #'last_seen' + #'conn:' + 1)
