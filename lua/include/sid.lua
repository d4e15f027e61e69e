-- The sid of the connection that the call is about: the end of its key, whose prefix is that of last_seen.
-- Reads its includer's conn_key and last_seen_key.
local sid = conn_key:sub(#last_seen_key - #'last_seen' + #'conn:' + 1)
