-- @include split_record
-- The game and the server of a record that was taken away, if it is the user's. Otherwise nil, and the record is put
-- back: the user's own was evicted, and the sid is another user's by now.
local function split_owned(conn_key, record, user_id, key_lifetime_ms)
  local game_id, its_user_id, server = split_record(record)
  if its_user_id == user_id then
    return game_id, server
  end
  redis.call('SET', conn_key, record, 'PX', key_lifetime_ms)
  return nil
end
