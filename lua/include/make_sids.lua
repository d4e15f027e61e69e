-- Put a user's list of connections together; see split_sids.
local function make_sids(sids, kept)
  local parts = {}
  for index, sid in ipairs(sids) do
    parts[index] = #sid .. ':' .. sid
  end
  local list = table.concat(parts)
  return kept == '' and list or list .. '=' .. kept
end
