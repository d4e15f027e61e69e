-- @include kept_ms
-- @include token_length
-- Tell whether the call whose answer is kept in a user's list from first on (see split_sids) may still be sent again.
-- now_us is a number here. What is too short for a token and the eight bytes of a time is another program's data.
local function is_recent(list, first, now_us)
  return #list > first + token_length + 6 and now_us - struct.unpack('<d', list, first + token_length) < 1000 * kept_ms
end
