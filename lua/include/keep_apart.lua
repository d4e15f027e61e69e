-- @include kept_ms
-- @include token_length
-- Move the answer that is kept with a user's list to its own key: the list goes, or is to hold another answer. Only a
-- recent answer (see is_recent) may still be asked for. While this key is there, the list is therefore gone or has a
-- newer answer, and a registration that finds a list without a recent answer need not look for the key.
local function keep_apart(key_prefix, kept)
  redis.call('SET', key_prefix .. 'reply:' .. kept:sub(1, token_length), kept:sub(token_length + 1), 'PX', kept_ms)
end
