-- @include kept_ms
-- @include token_length
-- Keep the answer that is with a user's list under its own key: the list goes, or is to hold another answer. Only one
-- that is recent (see is_recent) may be asked for. So while this key is there, the list is gone or has a newer answer:
-- a register that finds a list without a recent answer need not look for the key.
local function keep_apart(key_prefix, kept)
  redis.call('SET', key_prefix .. 'reply:' .. kept:sub(1, token_length), kept:sub(token_length + 1), 'PX', kept_ms)
end
