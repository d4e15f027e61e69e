-- @include retention_ms
-- How long a connection without a heartbeat is live. Reads its includer's key_lifetime_ms.
local conn_ttl_ms = key_lifetime_ms - retention_ms
