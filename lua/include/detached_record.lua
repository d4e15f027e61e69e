-- @include split_record
-- @include make_record
-- @include make_body
-- The record of a connection once it is detached: the last heartbeat moves into it, and it belongs to no server.
local function detached_record(record, last_seen)
  local game_id, user_id, _, epoch, connected_at, _, metadata = split_record(record)
  return make_record(game_id, make_body(user_id, epoch, connected_at, last_seen, '', metadata))
end
